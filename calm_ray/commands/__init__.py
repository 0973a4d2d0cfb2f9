"""What the commands of calm-ray do, one file a command."""
