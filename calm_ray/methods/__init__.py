"""The methods: each is a folder that declares itself."""
