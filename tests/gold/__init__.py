"""What other implementations answer, stored, and the scripts that asked them."""
