"""Defines the file formats of data sets: manifests, index files and split files. No module here imports torch."""
