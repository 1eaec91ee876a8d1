"""Tests of AtP*."""
