"""What a run writes about itself: its log, its page, its pictures."""
