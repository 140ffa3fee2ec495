"""What happens outside the subspace."""
