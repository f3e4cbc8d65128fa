"""Outside tools: an environment of its own for each, adapters that run inside it, and the worker that calls them."""
