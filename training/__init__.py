"""How the models that ship are made. Outside the package: nobody needs it to use them."""
