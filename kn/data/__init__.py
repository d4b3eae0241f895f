"""Text and tasks: documentation text, GLUE and its twins, files of the hub."""
