"""From the store to batches on the device: order, stream, collation, placebos."""
