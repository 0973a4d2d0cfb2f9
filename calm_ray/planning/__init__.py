"""What a run will take, worked out before anything starts: memory, places on nodes, tokens, disk and time.

Nothing here imports Ray, vLLM or torch: a model's size is read from its configuration and its files' headers.
"""
