"""The optimizer inside the subspace, its moments' precision, and how it crosses a refresh."""
