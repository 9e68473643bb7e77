"""The arithmetic of the runtime: attention over paged KV, norms, rotary embedding."""
