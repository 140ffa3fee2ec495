"""What everything else stands on: checks and their messages, paths, meshes, noise."""
