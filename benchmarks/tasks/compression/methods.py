"""What is compared of the image codecs: methods and their settings."""

METHODS = ("conditional", "fixed", "jpeg")
SUBSAMPLINGS = {"4:4:4": 0, "4:2:0": 2}
QUALITIES = (2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 96)
WANTED = (28.0, 30.0, 32.0, 34.0, 36.0)  # PSNR in dB
GRID_OF_PSNR = 200
