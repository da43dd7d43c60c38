"""A tied and an untied run side by side, in one page."""
