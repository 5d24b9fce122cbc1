"""Speed, memory and mixing: a command a file, figures in README.md."""
