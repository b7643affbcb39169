"""What Permafrost's jobs take, side by side with the code that they replace: `make bench`."""
