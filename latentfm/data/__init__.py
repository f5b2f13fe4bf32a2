"""From files on disk to batches on a device: sources, pictures, buckets, caches, the loader and the data check."""
