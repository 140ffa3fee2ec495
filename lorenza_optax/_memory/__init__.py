"""What training will take, counted on shapes."""
