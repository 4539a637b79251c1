"""What a run tells of itself: figures per epoch, events, arithmetic, and where they are followed."""
