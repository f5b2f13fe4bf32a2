"""The page's trainings: the runs of a folder, the tab that follows and starts them, and what programs call."""
