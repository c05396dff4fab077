"""All that resumes: its state under logical names, and how it reaches the disk."""
