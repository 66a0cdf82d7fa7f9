'use strict';
// tus-js-client in Node: node tus_node.js URL FILE OPTIONS WHAT, where WHAT is
//   send      the file, to its end;
//   resume    the same, stopped after the second chunk and begun again;
//   leave     the process ends after the second chunk; what it knows stays in a file;
//   remove    the upload, after the second chunk.
// Says what happens, a line of JSON each. With the option `stored` it goes on with
// uploads of an earlier process.

const fs = require('fs');
const path = require('path');
const tus = require('tus-js-client');

const [url, file, text, what] = process.argv.slice(2);
const {stored, ...options} = JSON.parse(text);
let chunks = 0, once = what !== 'send';

function say(event, value) {
  fs.writeSync(1, JSON.stringify({event, value}) + '\n');
}

const upload = new tus.Upload(fs.createReadStream(file), {
  endpoint: url,
  metadata: {filename: path.basename(file)},
  onBeforeRequest: request => say(request.getMethod(), request.getHeader('Upload-Offset')),
  onSuccess: () => say('success', upload.url),
  onError: error => say('error', error.message),
  onChunkComplete: async () => {
    chunks += 1;
    say('chunk', chunks);
    if (!once || chunks < 2) return;
    once = false;
    if (what === 'leave') process.exit();
    await upload.abort(what === 'remove');
    say('stopped', upload.url);
    if (what === 'resume') upload.start();
  },
  ...(stored ? {urlStorage: new tus.FileUrlStorage(stored)} : {}),
  ...options,
});

(async () => {
  const [previous] = stored ? await upload.findPreviousUploads() : [];
  if (previous) upload.resumeFromPreviousUpload(previous);
  upload.start();
})();
