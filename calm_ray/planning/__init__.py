"""Estimates what a run takes before anything starts: memory, placement on nodes, tokens, disk and time.

Imports neither Ray, vLLM nor torch: model sizes come from config.json and safetensors headers.
"""
