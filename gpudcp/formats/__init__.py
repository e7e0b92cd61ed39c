"""What bytes mean: the item envelope, `.metadata`, objects, checksums. No files are opened here."""
