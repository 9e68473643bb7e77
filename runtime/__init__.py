"""The bough runtime process: state as branches of a token tree, a radix cache, continuous batching."""
