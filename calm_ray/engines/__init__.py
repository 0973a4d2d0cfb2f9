"""vLLM engines in Ray actors: requests, dispatch, health and restarts."""
