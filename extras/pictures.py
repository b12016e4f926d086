"""
Pictures as people have them: upright, on white, in 8 bits a colour, whatever stands beside their
pixels. docs/data.md lists what is read though damaged; data.open_image hands over to this file.
"""

from contextlib import suppress

from PIL import Image, ImageOps, PngImagePlugin

# Else Pillow refuses a picture for a long text beside it.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def open_image(image, decode=True):
    """A path or PIL image -> RGB PIL image, upright, on white.

    Without decoding it looks at the header alone, and gives the picture as it is. Raises
    ValueError for an unreadable one.
    """
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        if opened.mode in ("I", "F"):
            raise ValueError(f"mode {opened.mode} has no white, save it with 8 or 16 bits a pixel")
        if not decode:
            return opened
        opened.load()
        return on_white(upright(in_8_bits(opened)))
    except Exception as error:  # Pillow's decoders raise whatever they like
        why = str(error)
        if isinstance(error, Image.DecompressionBombError):
            pixels = 2 * Image.MAX_IMAGE_PIXELS
            why = f"over {pixels:,} pixels, where Pillow fears a bomb: scale it down"
        raise ValueError(f"unreadable image: {str(image)[-80:]}: {why[:80]}") from error


def in_8_bits(image):
    """Deep greys are scaled: convert("RGB") would clip them at 255."""
    if not image.mode.startswith("I;16"):
        return image

    tags = getattr(image, "tag_v2", {})  # those of a TIFF: its greys may have 12 bits
    bits = tags.get(258, [16])[0]
    image = image.convert("I").point(lambda grey: grey / 2 ** (bits - 8)).convert("L")
    image.info.pop("transparency", None)  # a grey of 16 bits, which fits no more
    return image


def upright(image):
    """Turned as its EXIF says. Where that is broken, the pixels may be good all the same."""
    with suppress(Exception):
        # exif_transpose writes the EXIF back, which fails for broken tags: drop the raw bytes.
        image.getexif()
        for name in ("exif", "Raw profile type exif"):
            image.info.pop(name, None)
        return ImageOps.exif_transpose(image)
    return image


def on_white(image):
    if image.has_transparency_data:  # convert("RGB") would show what lies underneath
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
