"""Tests of pursuits."""
