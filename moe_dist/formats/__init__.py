"""File formats of data sets on disk: manifests, index files, split files. No file here imports torch."""
