"""The page of `latentfm app`: a form, a queue of one model's drawings, a gallery that is the outputs folder, and the door before them."""
