"""What programs call: the page's endpoints, by gradio_client and by plain HTTP."""

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from web.calling import generate, sent

from latentfm.pictures import read_settings


@pytest.fixture(scope="module")
def client(served) -> Client:
    return Client(served.url, verbose=False)


def test_a_program_draws_and_gets_the_file_with_its_settings(served, client, tmp_path):
    pictures = client.predict("a red apple", steps="2", count=2, seed=11, negative="a dog", api_name="/generate")
    assert [each["settings"]["seed"] for each in pictures] == [11, 12]
    data = httpx.get(f"{served.url}/{pictures[0]['url']}").content
    (tmp_path / "again.png").write_bytes(data)
    assert data == (served.studio.gallery.folder / pictures[0]["name"]).read_bytes()
    settings = read_settings(tmp_path / "again.png")
    assert settings == pictures[0]["settings"] and (settings["prompt"], settings["negative_prompt"]) == ("a red apple", "a dog")


def test_the_page_draws_what_the_command_line_draws(served, client, tiny_folder, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from latentfm.cli.main import app

    monkeypatch.chdir(tmp_path)
    here = client.predict("a red apple", steps="2", guidance="2", seed=5, size="32x48", solver="heun", api_name="/generate")[0]
    words = ["a red apple", "--steps", 2, "--guidance", 2, "--seed", 5, "--size", "32x48", "--solver", "heun", "--model", tiny_folder]
    assert CliRunner().invoke(app, ["generate", *map(str, words), "--device", "cpu", "--dtype", "float32"]).exit_code == 0
    there = tmp_path / "outputs" / here["name"]
    assert read_settings(there) == here["settings"]
    page, command = Image.open(served.studio.gallery.folder / here["name"]), Image.open(there)
    assert page.tobytes() == command.tobytes()


def test_from_a_picture_and_a_mask_by_program(served, client, tmp_path):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "p.png")
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "m.png")
    given = {"image": handle_file(tmp_path / "p.png"), "mask": handle_file(tmp_path / "m.png"), "size": "32"}
    settings = client.predict("a cat", steps="2", strength=0.5, **given, api_name="/generate")[0]["settings"]
    assert settings["strength"] == 0.5
    assert served.studio.gallery.source(settings["image"]) and Image.open(settings["mask"]).getbbox() == (0, 0, 32, 32)


def test_what_needs_another_is_told_and_a_black_mask_keeps_the_picture(served, tmp_path):
    for given, says in (({"strength": 0.5}, "strength 0.5 needs image"), ({"lora_strength": 2}, "lora_strength 2 needs lora")):
        event, answer = generate(served.url, **given)
        assert event == "error" and says in answer["error"]
    files = {}
    for name, colour in (("image", "red"), ("mask", "black")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        files[name] = sent(served.url, (tmp_path / f"{name}.png").read_bytes())
    event, answer = generate(served.url, strength=1, size="32", **files)
    assert event == "complete" and Image.open(answer[0][0]["settings"]["mask"]).getbbox() is None


def test_a_sweep_has_a_table_and_partial_results_come_as_they_are_made(served, client):
    job = client.submit("a cat", steps="1,2,3", api_name="/generate")
    pictures = job.result(timeout=120)
    assert [each["settings"]["steps"] for each in pictures] == [1, 2, 3]
    assert [len(each) for each in job.outputs()] == sorted(len(each) for each in job.outputs())
    assert any(name.startswith("grid-") for name in served.studio.gallery.names())


def test_the_endpoints_are_told_by_name_and_no_other_is_there(served, client):
    told = client.view_api(return_format="dict")
    assert set(told["named_endpoints"]) == {"/generate", "/gallery", "/choices"} and not told["unnamed_endpoints"]
    choices = client.predict(api_name="/choices")
    assert "heun" in choices["solvers"] and choices["limits"]["steps"] == 20 and "bundled" in choices["models"]
    generate(served.url)
    assert client.predict(2, api_name="/gallery")[0]["url"].startswith("pictures/")
