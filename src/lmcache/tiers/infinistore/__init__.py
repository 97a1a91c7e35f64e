"""The tier in an InfiniStore server, over TCP: `infinistore://`."""
