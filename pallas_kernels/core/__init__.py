"""What the ops share: dispatch, quantised arrays, paged pools and the streaming mask."""
