"""The hierarchical search for key blocks in one Triton launch a layer (in the making)."""
