//! tow: the laptop's side of Towline.
