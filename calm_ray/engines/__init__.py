"""vLLM engines in Ray actors: what they are asked, who is given what, and how they are kept alive."""
