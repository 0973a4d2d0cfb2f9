"""Questions become prompts, prompts become completions, completions become answers."""
