"""Speculative decoders, one file each. They reach the harness through its entry-point group like anybody's."""
