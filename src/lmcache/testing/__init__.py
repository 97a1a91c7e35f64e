"""Test support for third parties: the conformance suite for tiers."""
