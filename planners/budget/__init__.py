"""Allocation: a budget and the damage of cuts give the width or rank of each module."""
