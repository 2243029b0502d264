"""From a store to degraded patches in memory."""
