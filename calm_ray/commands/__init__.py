"""The commands of calm-ray, one file each."""
