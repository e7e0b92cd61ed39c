"""The DCP adapters: a torch StorageWriter and a torch StorageReader over chunk plans and executors."""
