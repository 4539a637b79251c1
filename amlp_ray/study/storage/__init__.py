"""What is kept of a study, and where: its folder, its storage, who holds it, what it was run
with."""
