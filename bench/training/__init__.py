"""The paper's experiments: small programs over one training loop."""
