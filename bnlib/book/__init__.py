"""What only the pages need: one look, figures, figures that move, and checks of the exercises."""
