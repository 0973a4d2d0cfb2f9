"""What a policy answers to held-out questions, and what the numbers mean."""
