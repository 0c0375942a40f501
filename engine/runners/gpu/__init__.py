"""The engine on a GPU: steps of single tokens by kernels of our own, chunks of a prompt in torch."""
