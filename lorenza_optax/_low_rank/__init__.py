"""The one transformation that every low-rank method is made of: configuration, state, a step."""
