"""What tests of third parties may use: the conformance suite for tiers."""
