"""Records, their file formats, templates, tokenising, collating, and the built-in world."""
