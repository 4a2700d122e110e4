"""Ways into other libraries. Each module needs its library; ``import selfattn`` needs none of them."""
