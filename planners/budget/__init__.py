"""A budget and what cuts cost -> the width or rank of each module."""
